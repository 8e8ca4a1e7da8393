"""GPUs of a host, between tenants and while they work. PURE.

What may live here: what a GPU is found to be (:mod:`readings`), what is judged of it (:mod:`checks`), and the states that it
goes through between two tenants (:mod:`lifecycle`). Nothing here touches a GPU: drivers read and act.
"""
