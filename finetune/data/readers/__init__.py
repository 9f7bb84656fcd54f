"""Data as users have it: files of rows (``containers``), and rows as documents (``forms``)."""

from finetune.data.readers.containers import Row, Torn, rows_of
from finetune.data.readers.forms import FORMS, Context
from finetune.data.readers.media import Media, open_media, read_map

__all__ = ["FORMS", "Context", "Media", "Row", "Torn", "open_media", "read_map", "rows_of"]
