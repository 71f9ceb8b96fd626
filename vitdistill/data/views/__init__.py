"""What a network sees of an image in one epoch: made one by one, or in batches on the device."""
