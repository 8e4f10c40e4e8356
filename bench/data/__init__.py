"""Where photos come from: data plugins, and what they share."""
