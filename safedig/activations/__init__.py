"""What passes through a model: recorded as a stream of batches, and put in training order."""
