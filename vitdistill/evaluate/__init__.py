"""What a network is worth: accuracy, calibration, k-NN and a linear probe of its features."""
