"""Being built."""
def status(): return "not built yet"
def supports(device): return "not built yet"
