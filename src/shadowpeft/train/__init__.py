"""Fine-tuning: the trainer that knows two paths, a run described by one YAML file, and its folder."""
