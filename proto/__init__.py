"""The wire: schemas, generated code, codec. Nothing is imported here: other packages of this name exist."""
