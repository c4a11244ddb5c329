"""C++ for this processor: attention in training, decoding, spelling; they take widths and tensors, never configs."""
