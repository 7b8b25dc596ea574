"""What the driver and the workers say to each other: jobs, their outcomes, and how long each may take."""
