"""The configuration: one YAML file becomes validated, frozen objects."""
