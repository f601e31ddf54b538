"""What measures infc, alone and beside its peers; `RESULTS.md` holds what was measured."""
