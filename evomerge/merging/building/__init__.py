"""What makes the models that recipes describe: live, exported, delivered."""
