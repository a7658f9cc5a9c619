"""Files: tensors by byte range, folders that are whole or not there.  Uses cluster."""
