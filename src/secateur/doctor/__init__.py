"""Whether secateur's promises hold on this machine: equality checks on tiny models, and what is installed."""
