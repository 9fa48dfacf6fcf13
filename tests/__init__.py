"""Properties and exact tiny values, room by room; the folders mirror src/boltlm."""
