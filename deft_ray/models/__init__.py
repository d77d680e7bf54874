"""Model families, loading, quantisation, adapters."""
