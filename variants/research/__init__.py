"""What the research variants' reports measure and draw; not scanned for variants."""
