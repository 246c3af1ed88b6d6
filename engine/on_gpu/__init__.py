"""An engine on a GPU: steps that are queued and collected later, captured graphs, a sampler that never waits
for the device."""
