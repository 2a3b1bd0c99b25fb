"""What a run is: one dataclass per section, read strictly from YAML and `section.key=value`. No torch."""
