package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tacit.dev/mesh"
)

const (
	defaultSignTimeout = 10 * time.Second
	// firstRetry doubles with each failure up to lastRetry, plus or minus half of it.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 30 * time.Second
	// signsAtOnce bounds the requests under way, so that a node full of new
	// identities does not fall upon the CA.
	signsAtOnce = 16
)

// ErrNotHeld is the cause of errors about an identity that nobody holds.
var ErrNotHeld = errors.New("the identity is not held")

// KeeperConfig is what a Keeper needs.
type KeeperConfig struct {
	// Signer is asked for certificates. Required.
	Signer Signer
	// Log gets renewals and their failures; nil discards.
	Log *slog.Logger
	// SignTimeout bounds one request to the Signer; 0 means 10 s.
	SignTimeout time.Duration
}

// Keeper keeps a valid leaf for every identity that is held.
//
//	         Hold                success
//	nobody ────────► fetching ◄──────────── renewing
//	   ▲                │ ▲ └───► valid ───────► ▲ │
//	   │        failure │ │       half of its    │ │ failure
//	   │                ▼ │       life is over   │ ▼
//	   │              backoff                  backoff; the old leaf is used
//	   └──── last release ─────                until it expires
type Keeper struct {
	cfg  KeeperConfig
	wake chan struct{} // one token: there is an entry that Run has not started
	slot chan struct{} // one token per request to the Signer

	// held is read without a lock; writers hold mu, copy, and swap.
	held atomic.Pointer[map[mesh.ID]*entry]
	mu   sync.Mutex
}

// entry is one held identity.
type entry struct {
	id   mesh.ID
	leaf atomic.Pointer[Leaf]
	gone chan struct{} // closed at the last release

	// Guarded by Keeper.mu.
	holders int
	started bool

	mu      sync.Mutex
	changed chan struct{} // closed and replaced with every outcome; guarded by mu, like the rest
	lastErr error
	nextTry time.Time
}

// LeafStatus tells of one held identity, for dumps.
type LeafStatus struct {
	Identity  string    `json:"identity"`
	Holders   int       `json:"holders"`
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	// Bundle is the fingerprint of the roots that came with the leaf.
	Bundle string `json:"bundle,omitempty"`
	// NextTry is when the Signer is asked again.
	NextTry time.Time `json:"next_try,omitzero"`
	// LastError is the last failure since the last success.
	LastError string `json:"last_error,omitempty"`
}

// NewKeeper returns a Keeper that holds nobody. Nothing is fetched before Run.
func NewKeeper(cfg KeeperConfig) *Keeper {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.SignTimeout <= 0 {
		cfg.SignTimeout = defaultSignTimeout
	}
	k := &Keeper{cfg: cfg, wake: make(chan struct{}, 1), slot: make(chan struct{}, signsAtOnce)}
	k.held.Store(&map[mesh.ID]*entry{})
	return k
}

// Run fetches and renews until ctx is done, and returns nil when all requests
// have ended. Leaves stay usable afterwards.
func (k *Keeper) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		for _, e := range k.unstarted() {
			wg.Go(func() { k.keep(ctx, e) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-k.wake:
		}
	}
}

func (k *Keeper) unstarted() []*entry {
	k.mu.Lock()
	defer k.mu.Unlock()
	var fresh []*entry
	for _, e := range *k.held.Load() {
		if !e.started {
			e.started = true
			fresh = append(fresh, e)
		}
	}
	return fresh
}

// Hold asks for a leaf of id from now on, until release is called. Holds are
// counted; release may be called more than once.
func (k *Keeper) Hold(id mesh.ID) (release func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := (*k.held.Load())[id]
	if e == nil {
		e = &entry{id: id, gone: make(chan struct{}), changed: make(chan struct{})}
		held := maps.Clone(*k.held.Load())
		held[id] = e
		k.held.Store(&held)
		select {
		case k.wake <- struct{}{}:
		default:
		}
	}
	e.holders++
	return sync.OnceFunc(func() { k.release(e) })
}

func (k *Keeper) release(e *entry) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e.holders--; e.holders > 0 {
		return
	}
	held := maps.Clone(*k.held.Load())
	delete(held, e.id)
	k.held.Store(&held)
	close(e.gone)
}

// keep has a leaf for one identity until ctx is done or nobody holds it.
func (k *Keeper) keep(ctx context.Context, e *entry) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	retry := firstRetry
	for {
		leaf, err := k.fetch(ctx, e)
		var wait time.Duration
		if err == nil {
			retry = firstRetry
			wait = renewIn(time.Until(leaf.NotAfter))
		} else {
			wait = retry/2 + rand.N(retry)
			retry = min(2*retry, lastRetry)
		}
		k.settle(e, leaf, err, wait)
		if !e.pause(ctx, wait) {
			return
		}
	}
}

// renewIn is half of what is left, plus or minus a tenth, so that the leaves of
// a node, and of all nodes after a restart of control, do not renew as one.
func renewIn(left time.Duration) time.Duration {
	wait := left/2 - left/20 + rand.N(max(left/10, 1))
	return max(wait, firstRetry)
}

// pause waits; false means that the entry is over.
func (e *entry) pause(ctx context.Context, wait time.Duration) bool {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-e.gone:
		return false
	case <-t.C:
		return true
	}
}

// fetch asks the Signer once.
func (k *Keeper) fetch(ctx context.Context, e *entry) (*Leaf, error) {
	select {
	case k.slot <- struct{}{}:
		defer func() { <-k.slot }()
	case <-e.gone:
		return nil, ErrNotHeld
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, k.cfg.SignTimeout)
	defer cancel()
	key, csr, err := newRequest(e.id)
	if err != nil {
		return nil, err
	}
	chain, err := k.cfg.Signer.Sign(ctx, e.id, csr)
	if err != nil {
		return nil, fmt.Errorf("ask for a certificate of %s: %w", e.id, err)
	}
	return NewLeaf(e.id, key, chain, time.Now())
}

// settle publishes the outcome of a request. A failure leaves the leaf as it is.
func (k *Keeper) settle(e *entry, leaf *Leaf, err error, wait time.Duration) {
	if err == nil {
		e.leaf.Store(leaf)
		k.cfg.Log.Info("certificate issued", "identity", e.id.String(), "not_after", leaf.NotAfter,
			"bundle", leaf.Bundle.Fingerprint(), "renew_in", wait)
	} else if !errors.Is(err, context.Canceled) && !errors.Is(err, ErrNotHeld) {
		k.cfg.Log.Warn("certificate not issued", "identity", e.id.String(), "err", err, "retry_in", wait)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lastErr, e.nextTry = err, time.Now().Add(wait)
	close(e.changed)
	e.changed = make(chan struct{})
}

// Ready waits until there is a valid leaf of id, which must be held. Its error
// names the last failure of the Signer.
func (k *Keeper) Ready(ctx context.Context, id mesh.ID) error {
	e := (*k.held.Load())[id]
	if e == nil {
		return fmt.Errorf("certificate of %s: %w", id, ErrNotHeld)
	}
	for {
		e.mu.Lock()
		changed := e.changed
		e.mu.Unlock()
		if e.leaf.Load().valid(time.Now()) {
			return nil
		}
		select {
		case <-changed:
		case <-e.gone:
			return fmt.Errorf("certificate of %s: %w", id, ErrNotHeld)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait for a certificate of %s: %w", id, ctx.Err()), e.failure())
		}
	}
}

// Leaf returns the leaf of id. It never blocks. The error says why there is none
// that is valid now; Reason calls that expired or no_certificate.
func (k *Keeper) Leaf(id mesh.ID) (*Leaf, error) {
	e := (*k.held.Load())[id]
	if e == nil {
		return nil, refuseOwn(ReasonNoCertificate, id, ErrNotHeld)
	}
	leaf := e.leaf.Load()
	if leaf.valid(time.Now()) {
		return leaf, nil
	}
	if leaf == nil {
		return nil, refuseOwn(ReasonNoCertificate, id, errors.Join(errors.New("none issued yet"), e.failure()))
	}
	return nil, refuseOwn(ReasonExpired, id, errors.Join(fmt.Errorf("it was valid to %s", stamp(leaf.NotAfter)), e.failure()))
}

func (e *entry) failure() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lastErr
}

// OwnError says why there is no valid leaf of an identity of this node.
type OwnError struct {
	// Reason is ReasonExpired or ReasonNoCertificate.
	Reason string
	ID     mesh.ID
	Err    error
}

func (e *OwnError) Error() string { return fmt.Sprintf("our certificate of %s: %v", e.ID, e.Err) }

func (e *OwnError) Unwrap() error { return e.Err }

func refuseOwn(reason string, id mesh.ID, err error) error { return &OwnError{reason, id, err} }

// FirstEnd is when the first of all leaves ends, the zero time if there is none.
func (k *Keeper) FirstEnd() (first time.Time) {
	for _, e := range *k.held.Load() {
		if l := e.leaf.Load(); l != nil && (first.IsZero() || l.NotAfter.Before(first)) {
			first = l.NotAfter
		}
	}
	return first
}

// Dump tells of all held identities, sorted.
func (k *Keeper) Dump() []LeafStatus {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := []LeafStatus{}
	for _, e := range *k.held.Load() {
		all = append(all, e.status())
	}
	slices.SortFunc(all, func(a, b LeafStatus) int { return strings.Compare(a.Identity, b.Identity) })
	return all
}

func (e *entry) status() LeafStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := LeafStatus{Identity: e.id.String(), Holders: e.holders, NextTry: e.nextTry}
	if l := e.leaf.Load(); l != nil {
		s.NotBefore, s.NotAfter, s.Bundle = l.NotBefore, l.NotAfter, l.Bundle.Fingerprint()
	}
	if e.lastErr != nil {
		s.LastError = e.lastErr.Error()
	}
	return s
}
