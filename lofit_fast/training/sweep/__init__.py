"""Many trainings on one loaded base."""
