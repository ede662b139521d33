"""Labels for recorded pictures: batches to label, the page on which people label them, and how labels land."""
