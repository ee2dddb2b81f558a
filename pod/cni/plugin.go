package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"tacit.dev/pause"
)

// Plugin is the program tacit-cni.
type Plugin struct {
	// Env is os.Getenv.
	Env    func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Run does what CNI_COMMAND asks for, prints the result or the error as CNI
// wants it, and returns the exit code.
func (p Plugin) Run(ctx context.Context) int {
	if Command(p.Env("CNI_COMMAND")) == Version {
		return p.version()
	}
	c, e := readConfig(p.Stdin)
	if e == nil {
		e = p.do(ctx, c)
	}
	if e != nil {
		e.CNIVersion = c.CNIVersion
		p.print(e)
		return 1
	}
	return 0
}

func (p Plugin) version() int {
	p.print(struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{"1.1.0", versions()})
	return 0
}

func (p Plugin) do(ctx context.Context, c config) *Error {
	switch Command(p.Env("CNI_COMMAND")) {
	case GC:
		return nil // the agent sees by itself when a namespace is gone
	case Status:
		// Ready, also without an agent: it begins as a pod itself, and pods outside of
		// the mesh begin. A node that is not ready would start neither.
		return nil
	}
	r, e := request(p.Env, c)
	if e != nil {
		return e
	}
	if !slices.Contains(c.Exempt, r.Namespace) {
		ctx, cancel := context.WithTimeout(ctx, c.timeout)
		defer cancel()
		e = p.ask(ctx, c, r)
	}
	if e == nil && r.Command == Add {
		p.printRaw(c.PrevResult)
	}
	return e
}

const (
	// awayPatience is how long a pod waits for an agent that is away, before it is
	// refused and the runtime asks again later: a restart takes less.
	awayPatience = 10 * time.Second
	// askPause is between two tries.
	askPause = 100 * time.Millisecond
)

// ask asks the agent, and again if that one is ending or none is there.
func (p Plugin) ask(ctx context.Context, c config, r Request) *Error {
	began := time.Now()
	for {
		answer, err := Ask(ctx, c.Agent, r)
		away := err != nil && ctx.Err() == nil && time.Since(began) < awayPatience && p.mustWait(c, r)
		ending := err == nil && answer.Error != nil && answer.Error.Code == CodeEnding
		if (away || ending) && pause.For(ctx, askPause) {
			continue
		}
		if err != nil {
			return p.unanswered(c, r, err)
		}
		return answer.Error
	}
}

// mustWait reports whether r is not to be done without an agent.
func (p Plugin) mustWait(c config, r Request) bool {
	return r.Command != Del && MayEnroll(c.Namespaces, r.Namespace)
}

// unanswered decides what an absent agent means. What may have to be protected
// does not begin without it. But a pod may end: nothing of it is left once its
// namespace is gone, and the agent notices that when it is back.
func (p Plugin) unanswered(c config, r Request, err error) *Error {
	if !p.mustWait(c, r) {
		fmt.Fprintf(p.Stderr, "tacit-cni: %s of %s/%s without the agent: %v\n", r.Command, r.Namespace, r.Name, err)
		return nil
	}
	return fault(CodeTryAgain, "the tacit agent of this node does not answer, so the pod cannot be protected and is not started", err)
}

func (p Plugin) print(v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		fmt.Fprintf(p.Stderr, "tacit-cni: %v\n", err)
		return
	}
	p.printRaw(b)
}

func (p Plugin) printRaw(b []byte) {
	if _, err := p.Stdout.Write(append(b[:len(b):len(b)], '\n')); err != nil {
		fmt.Fprintf(p.Stderr, "tacit-cni: write the result: %v\n", err)
	}
}

// answerMargin is how much earlier than the plugin the agent gives up, so that
// its reason is heard.
const answerMargin = 500 * time.Millisecond

// Patience is how long the agent may work on r.
func (r *Request) Patience() time.Duration {
	t := r.Timeout
	if t <= 0 {
		t = DefaultTimeout
	}
	return max(t-answerMargin, t/2)
}
