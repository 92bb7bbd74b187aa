"""What is on disk, in and out; each reader beside its writer."""
