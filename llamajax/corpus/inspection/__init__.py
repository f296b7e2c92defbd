"""Look into a prepared directory: documents, copies, order, overlap with evaluations."""
