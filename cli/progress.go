package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"tacit.dev/pause"
)

// pollEvery is how often the cluster is asked whether something has happened.
const pollEvery = 250 * time.Millisecond

// progress tells a person what is done and what is waited for.
type progress struct {
	out   io.Writer
	began time.Time
}

func newProgress(out io.Writer) *progress { return &progress{out: out, began: time.Now()} }

func (p *progress) say(format string, args ...any) {
	fmt.Fprintf(p.out, "%6.1fs  %s\n", time.Since(p.began).Seconds(), fmt.Sprintf(format, args...))
}

// await asks until nothing is missing, and says what is whenever that changes. An
// error of the API server is something that is missing.
func (p *progress) await(ctx context.Context, ask func(context.Context) (missing string, err error)) error {
	said := ""
	for {
		missing, err := ask(ctx)
		if err != nil {
			missing = err.Error()
		}
		if missing == "" && err == nil {
			return nil
		}
		if missing != said && ctx.Err() == nil {
			p.say("waiting for %s", missing)
			said = missing
		}
		if !pause.For(ctx, pollEvery) {
			return fmt.Errorf("waiting for %s: %w", said, ctx.Err())
		}
	}
}
