package xds

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/wire/xds/message"
)

// maxInterest bounds the names that one subscription asks for.
const maxInterest = 1024

// interest is what a client asks for that does not want everything: it is told how these
// names are now, also that one is not there, and what becomes of them. nil is everything.
type interest struct {
	names map[string]bool
	fresh map[string]bool // of these, not told as yet
}

// newInterest reads the first request of a subscription.
func newInterest(req *message.DeltaDiscoveryRequest) (*interest, error) {
	i := &interest{names: map[string]bool{}, fresh: map[string]bool{}}
	for _, name := range req.GetResourceNamesSubscribe() {
		if name == "*" {
			return nil, nil
		}
	}
	if len(req.GetResourceNamesSubscribe()) == 0 {
		return nil, nil
	}
	return i, i.change(req)
}

// change takes up what a request adds and leaves out. Who has everything is told nothing
// for asking again.
func (i *interest) change(req *message.DeltaDiscoveryRequest) error {
	if i == nil {
		return nil
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		delete(i.names, name)
		delete(i.fresh, name)
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		if name == "*" || len(name) > maxName || len(i.names) >= maxInterest {
			return status.Errorf(codes.InvalidArgument, "subscribe to %.64q besides %d names: want short ones, at most %d, or a stream for everything", name, len(i.names), maxInterest)
		}
		i.names[name], i.fresh[name] = true, true
	}
	return nil
}

// passes reports whether e is nobody's business, or is told as a fresh one.
func (i *interest) passes(e *entry) bool {
	return i != nil && (!i.names[e.name] || i.fresh[e.name])
}

// tell gives those that are fresh. Called with told.
func (i *interest) tell(t *table) (found []*entry) {
	if i == nil {
		return nil
	}
	for name := range i.fresh {
		e := t.get(name)
		if e == nil {
			e = &entry{name: name, gone: true}
		}
		found = append(found, e)
	}
	clear(i.fresh)
	return found
}
