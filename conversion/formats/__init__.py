"""One module for each file format, all with the same interface; `conversion.tensors` describes it."""
