package build

import (
	"context"
	"errors"
	"time"
)

// Poll tries until it works; when ctx ends it returns the last error too.
func Poll(ctx context.Context, try func() error) error {
	pause := 5 * time.Millisecond
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(pause):
		}
		pause = min(2*pause, 200*time.Millisecond)
	}
}
