"""The captioned images: caption files, decoded pixels, batches."""
