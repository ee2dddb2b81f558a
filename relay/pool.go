package relay

// Pool lends what a connection needs only while its bytes move. It is safe for
// concurrent use.
type Pool struct{}

// NewPool returns an empty pool. Close releases its pipes.
func NewPool() *Pool { return &Pool{} }

// Close releases what the pool keeps. Joins that still run are not disturbed.
func (p *Pool) Close() {}
