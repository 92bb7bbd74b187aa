"""The method: prompts to groups, groups to losses, losses to updates."""
