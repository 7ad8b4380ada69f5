"""Images from files to the network's input: read, resize, normalize. Knows neither models nor results."""
