"""What a mix names, read, rendered and prepared: from files of rows to documents as tokens."""
