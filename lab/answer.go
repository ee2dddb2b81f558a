package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
)

// verb is one thing that a lab can be told to do.
type verb struct {
	name string
	// usage are its words, about one line of what it does.
	usage, about string
	do           func(ctx context.Context, c *Cluster, call verbCall) error
	// not says that it takes a story's "!" itself: absence is not the same as
	// failure where one has to wait for presence.
	not bool
}

// verbCall is one verb as it was asked for.
type verbCall struct {
	// args are all words as they came; the following are what parseCall made of them.
	args  []string
	words []string
	// options are the words KEY=VALUE (or --KEY=VALUE, --KEY VALUE) before "--".
	options []option
	// rest is what comes after "--".
	rest                  []string
	dir                   string
	not                   bool
	stdin, stdout, stderr *os.File
}

type option struct{ key, value string }

// parseCall tells words, options and the rest apart.
func parseCall(args []string) (words []string, options []option, rest []string, err error) {
	if i := slices.Index(args, "--"); i >= 0 {
		args, rest = args[:i], args[i+1:]
	}
	for i := 0; i < len(args); i++ {
		a := args[i]
		if long, ok := strings.CutPrefix(a, "--"); ok && !strings.Contains(a, "=") {
			if i++; i == len(args) {
				return nil, nil, nil, fmt.Errorf("%s: it wants a value", a)
			}
			options = append(options, option{long, args[i]})
			continue
		}
		key, value, ok := strings.Cut(strings.TrimPrefix(a, "--"), "=")
		if !ok || strings.HasPrefix(a, "/") { // a path, which may have a query
			words = append(words, a)
			continue
		}
		options = append(options, option{key, value})
	}
	return words, options, rest, nil
}

// separate puts a "--" before the command of exec, where a person left it out.
func separate(args []string) []string {
	if len(args) == 0 || slices.Contains(args, "--") {
		return args
	}
	at := 1
	if len(args) > 1 && strings.HasPrefix(args[1], "user=") {
		at = 2
	}
	return slices.Insert(slices.Clone(args), at, "--")
}

// answer carries out one request. A closed connection cancels it.
func (c *Cluster) answer(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	r, files, err := receiveRequest(conn)
	defer closeAll(files)
	if err != nil {
		c.log.Warn("request", "err", err)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hungUp := make(chan struct{})
	go watchHangUp(conn, cancel, hungUp)
	err = c.carryOut(ctx, r, files)
	c.log.Info("verb", "args", strings.Join(r.Args, " "), "err", err)
	var code exitError
	a := reply{}
	switch {
	case errors.As(err, &code):
		a.Code = int(code)
	case err != nil:
		a = reply{Code: 1, Error: err.Error()}
	}
	_ = sendReply(conn, a) // whoever asked has gone
	conn.Close()
	<-hungUp
}

// watchHangUp ends when conn is closed, by whoever.
func watchHangUp(conn io.Reader, cancel func(), done chan<- struct{}) {
	defer close(done)
	_, _ = io.Copy(io.Discard, conn)
	cancel()
}

func (c *Cluster) carryOut(ctx context.Context, r request, files []*os.File) error {
	v, ok := findVerb(r.Args[0])
	if !ok {
		return fmt.Errorf("unknown verb %q; there are: %s", r.Args[0], strings.Join(Verbs(), " "))
	}
	args := r.Args[1:]
	if v.name == "exec" {
		args = separate(args)
	}
	words, options, rest, err := parseCall(args)
	if err != nil {
		return err
	}
	call := verbCall{
		args: args, words: words, options: options, rest: rest, dir: r.Dir, not: r.Not,
		stdin: files[0], stdout: files[1], stderr: files[2],
	}
	err = v.do(ctx, c, call)
	var bad usageError
	if errors.As(err, &bad) {
		return fmt.Errorf("%s: %w\nusage: %s %s", v.name, err, v.name, v.usage)
	}
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// usageError has the verb's usage printed.
type usageError string

func (e usageError) Error() string { return string(e) }

// want checks the number of words.
func (call verbCall) want(least, most int) error {
	if n := len(call.words); n < least || most >= 0 && n > most {
		return usageError(fmt.Sprintf("%d words", n))
	}
	return nil
}

// take removes and returns the last option of that name.
func (call *verbCall) take(key, otherwise string) string {
	for i, o := range slices.Backward(call.options) {
		if o.key == key {
			call.options = slices.Delete(slices.Clone(call.options), i, i+1)
			return o.value
		}
	}
	return otherwise
}

// takeAll removes and returns all options of that name.
func (call *verbCall) takeAll(key string) (values []string) {
	var others []option
	for _, o := range call.options {
		if o.key == key {
			values = append(values, o.value)
		} else {
			others = append(others, o)
		}
	}
	call.options = others
	return values
}

// done refuses options that nobody took.
func (call verbCall) done() error {
	if len(call.options) > 0 {
		return usageError(fmt.Sprintf("unknown option %s", call.options[0].key))
	}
	return nil
}

// Verbs are the names of all verbs that a running lab understands.
func Verbs() []string {
	var names []string
	for _, v := range verbs() {
		names = append(names, v.name)
	}
	return names
}

// TakesNot reports whether a verb looks for absence itself when a story says "!".
func TakesNot(name string) bool {
	v, _ := findVerb(name)
	return v.not
}

// Usage is one line per verb, for help.
func Usage(name string) (usage, about string) {
	v, _ := findVerb(name)
	return v.usage, v.about
}

func findVerb(name string) (verb, bool) {
	for _, v := range verbs() {
		if v.name == name {
			return v, true
		}
	}
	return verb{}, false
}
