"""What an engine remembers: regions, rmap items, trees by checksum (forest), the store of shared
pages, the map budget and what a mapping costs. Plain structs and functions; the caller holds the
engine's lock. Words: region, rmap item, slot, map budget."""
