"""Image to four feature maps. One file a backbone, and its parts."""
