"""Models with a soft prompt or a prefix before every text: live, exported, and loaded again."""
