"""How clients and priorities share what there is too little of, the same in the router and in workers."""

FLOOR = 8  # one place in this many goes to a lower priority, so that none starves
LITTLE = 8  # a client that runs something takes only what leaves the other this many times as much
