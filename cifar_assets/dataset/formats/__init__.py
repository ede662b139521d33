"""The supported image file formats. Each module reads one format and yields row batches."""
