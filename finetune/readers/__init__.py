"""Data as users have it: files of rows (``containers``), and rows as documents (``forms``)."""

from finetune.readers.containers import Row, Torn, rows_of
from finetune.readers.forms import FORMS, Context
from finetune.readers.media import Media, open_media, read_map

__all__ = ["FORMS", "Context", "Media", "Row", "Torn", "open_media", "read_map", "rows_of"]
