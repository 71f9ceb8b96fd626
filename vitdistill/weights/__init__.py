"""Networks in and out: built from timm, files and folders, and exported."""
