package identity

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"tacit.dev/mesh"
)

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
type Keeper struct{}

// LeafStatus tells of one held identity, for dumps.
type LeafStatus struct {
	Identity  string    `json:"identity"`
	Holders   int       `json:"holders"`
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	// NextTry is when the Signer is asked again.
	NextTry time.Time `json:"next_try,omitzero"`
	// LastError is the last failure since the last success.
	LastError string `json:"last_error,omitempty"`
}

// NewKeeper returns a Keeper that holds nobody. Nothing is fetched before Run.
func NewKeeper(cfg KeeperConfig) *Keeper { return &Keeper{} }

// Run fetches and renews until ctx is done, and returns when all requests have ended.
func (k *Keeper) Run(ctx context.Context) error { return errors.New("not yet") }

// Hold asks for a leaf of id from now on, until release is called. Holds are
// counted; release may be called more than once.
func (k *Keeper) Hold(id mesh.ID) (release func()) { return func() {} }

// Ready waits until there is a valid leaf of id, which must be held. Its error
// names the last failure of the Signer.
func (k *Keeper) Ready(ctx context.Context, id mesh.ID) error { return errors.New("not yet") }

// Leaf returns the leaf of id. It never blocks. The error says why there is none
// that is valid now.
func (k *Keeper) Leaf(id mesh.ID) (*Leaf, error) { return nil, errors.New("not yet") }

// Dump tells of all held identities, sorted.
func (k *Keeper) Dump() []LeafStatus { return nil }
