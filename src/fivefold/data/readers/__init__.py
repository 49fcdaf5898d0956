"""Files that users bring: folders, zips and tables, read as rows. No torch."""
