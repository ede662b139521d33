"""The file formats images come in. Each module reads one and yields row batches."""
