"""`mgrpo bench store`: what the store takes in and hands out; what a decoupled step costs."""
