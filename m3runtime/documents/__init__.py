"""Documents become references: reading, splitting, and overlap between texts."""
