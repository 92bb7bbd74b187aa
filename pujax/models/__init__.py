"""The student: one decoder, its families, and its weights on disk."""
