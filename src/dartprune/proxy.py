"""stub"""
def cached_forward_proxy(*a): raise NotImplementedError
def forward_proxy_flops(*a): return 0
