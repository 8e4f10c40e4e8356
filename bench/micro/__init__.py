"""The embedded tier: a drawn world of portraits, small models of the real classes, and the script that trains them."""
