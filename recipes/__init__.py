"""Ready model.yaml files and the small bundled model: data only."""
