"""The wire: schemas, generated code and the frame codec. Nothing is imported here: other packages of this name exist."""
