"""Images: the data sets by name, their splits and binarisation, and the batches of a training."""
